"""What of a cluster nobody has rented yet: discrete events, and a rule."""
