"""Cheap variants: adapters beside frozen weights."""
