"""The course: lessons, the laws of their exercises, and the check."""
