"""From YAML and the command line to a checked config: schema, composition, sweeps."""
