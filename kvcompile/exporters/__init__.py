"""Exporters: a compiled model written in a form that others run without kvcompile."""
