"""The report and the live view."""
