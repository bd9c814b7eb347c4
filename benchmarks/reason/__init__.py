"""What ``reasoning`` measures, its tables and its plots."""
