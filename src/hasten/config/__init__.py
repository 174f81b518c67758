"""What a run is: one typed configuration, from defaults, preset, file and command line."""
