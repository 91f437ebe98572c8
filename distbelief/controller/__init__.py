"""Controller: knows who takes part in a run, where the shards are, and who trains on what.

machine.py   Controller: the state machine; one note in, one answer out
             account.py, fences.py, saves.py, pace.py: the nouns that it is made of
process.py   the process that has the machine and a socket
standby.py   the launcher's copy of the machine, and the orders it gives
entry.py     what the two write to each other
"""
