"""What follows a run beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow."""
