"""Geometry and georeferenced storage of rasters too big for memory; never imports torch."""
