"""What the machine decides for the person, each time with a reason."""
