"""Finished runs become arms, curves and one table."""
