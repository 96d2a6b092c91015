"""The gateway: authenticates, validates, stores, waits, answers.

It computes nothing, and imports no framework that does.
"""
