"""What people run on traces."""
