"""The verbs: one module per stage of dvc.yaml, each with one public function of the same name."""
