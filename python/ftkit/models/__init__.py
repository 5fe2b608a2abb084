"""Model families: one file a family, from configuration to modules and weight names."""
