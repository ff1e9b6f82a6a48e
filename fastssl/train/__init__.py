"""Training: Lightning modules and data modules, what they report, and the runs they leave."""
