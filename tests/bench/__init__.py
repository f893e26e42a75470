"""`make bench`: what the server does per second and per byte, as ratios to references measured in the same run."""
