"""Stages, from plan to saved directory."""
