"""Files that are not what they should be, as code: what is done to a good file, and what must come of it.

case.py       what a case is, how its outcome is judged, and mutations that suit any format
runner.py     runs a module's cases in processes of their own, and notices those that die or do not end
worker.py     that process
planted.py    openers with every fault a reader can have: each must be noticed
the others    the cases, by format
"""
