"""The supported model shapes, their losses and their sizes."""
