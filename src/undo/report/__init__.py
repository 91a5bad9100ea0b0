"""Results become figures, claims, tables and one page."""
