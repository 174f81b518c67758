"""The command line: a module a verb, thin; what the verbs do is in the packages below."""
