"""Recipes: what one YAML file says of a run (model, data, task, policies, schedule), the runs of it, and their records.

Nothing is imported here: recipes need pydantic, which an installation without the command line may lack, and what a
record or a function's name is does not.
"""
