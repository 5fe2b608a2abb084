"""What a server keeps and does besides answering: adapters, files, training jobs, feedback, keys.

The core speaks HTTP and asks the desk (`desk.py`); everything here lies below one state directory:

adapters.json, adapters/HASH/    which names lead to which contents, and the contents
files/file-…/                     uploaded rows              jobs/ftjob-…/   jobs, with their rows and events
runs/ftjob-…/                     the jobs' run directories  feedback/       ratings, as rows to train on

Whatever is written appears whole or not at all, and a server that was killed finds everything again.
"""

from ftkit.serve.desk import Desk
from ftkit.serve.refused import Refused

__all__ = ["Desk", "Refused"]
