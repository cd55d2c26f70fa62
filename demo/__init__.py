"""What is simulated here: a company-data service, and a script that stands in for a model.

A project of your own deletes this folder, and the lines of agent.py and tools.py that import it.
"""
