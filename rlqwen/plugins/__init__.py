"""Find objects that users and packages provide: by registered name, module path or file."""
