"""BAGEL inside other programs: each folder is one of them. Nothing else in the package knows of these."""
