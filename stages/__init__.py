"""The verbs: one module per stage of dvc.yaml, each with one public function of the same name."""

import signal
import sys
import warnings

if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # this process is a stage, which now imports what takes seconds: until edge.run, Ctrl-C ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
# fastai uses it at import, and whoever runs a stage can do nothing about that
warnings.filterwarnings("ignore", message=".torch.jit.script. is deprecated", category=FutureWarning)
