"""The registry: every line that talks to MLflow."""
