"""Measurements: each is one command that prints a table and writes JSON.

They are ratios, within one run, to what a user would take otherwise.
"""
