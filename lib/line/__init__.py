"""The line on one machine: its Ray head, MLflow server and Prometheus, started and ended."""
