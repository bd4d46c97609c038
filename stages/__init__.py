"""The verbs: one module per stage of dvc.yaml, each with one public function of the same name."""

import warnings

# fastai uses it at import, and whoever runs a stage can do nothing about that
warnings.filterwarnings("ignore", message=".torch.jit.script. is deprecated", category=FutureWarning)
