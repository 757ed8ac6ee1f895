"""Processes of a job: environment, groups, errors of one rank told to all."""
