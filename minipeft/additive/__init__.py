"""Methods that add modules or vectors beside the frozen model."""
