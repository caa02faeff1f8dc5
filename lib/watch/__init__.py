"""What is seen of the models that are served."""
