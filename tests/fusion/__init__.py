"""Tests of sparsevlm.fusion."""
