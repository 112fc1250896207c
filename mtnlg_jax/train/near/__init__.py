"""The near tier of checkpoints: copies of the state on the hosts themselves, every few steps.

    NEAR_FOLDER/RUN/STEP-START/
      3.own.data      the shards of the state that process 3 holds, one after the other
      3.own.json      written last: name, ranges, offset and CRC-32 of each shard, metadata, digest
      2.peer.data     shards that process 2 alone holds, kept by process 3 for it
      2.peer.json
      3.finite        empty: a loss of these parameters was finite

RUN is drawn once for a run folder, START once for a start of the run, so that neither two runs nor
two trajectories of one run mix. Shards are named by array and ranges: any mesh, and any number of
processes, restores any copy whose shards all exist somewhere.
"""
