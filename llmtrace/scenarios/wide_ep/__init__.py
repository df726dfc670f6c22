"""Where do the engine's steps spend their time over ranks and nodes, and who waits for whom?

From the ``engine_step`` spans of any store; nothing here knows how they were made.
"""
