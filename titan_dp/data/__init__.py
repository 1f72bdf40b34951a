"""From text to batches. The whole path of a batch, from a file of text to the model's arguments, in nine steps.

Rows have T = training.seq_len tokens, a micro-batch has L = training.local_batch_size rows, and G = training.global_batch_size
rows are one optimizer step. Each step names the file to read next.

Once, before training (`titan-dp prepare`):

 1. sources.py    (and formats.py) Files or a Hugging Face dataset -> documents, one str at a time, in a fixed order.
 2. tokenizer.py  A document -> its ids, an array. tokenise.py does it in batches and threads, long documents in pieces.
 3. prepare.py    BOS and EOS go around each document; the hash of its text says whether it is held out. Documents are
                  concatenated, in order -> train/ and validation/.
 4. shards.py     A folder: shard-00000.npy [tokens] uint16 or uint32, and shard-00000.starts.npy [documents] int64, where
                  documents begin. The sha256 of its manifest is the data's fingerprint. A folder is read as one long row of
                  tokens by memory map.

For every step of training, on every rank:

 5. batch.Place   (step, micro-batch, rank) -> L consecutive samples of the run's order. Of shards, a checkpoint
                  keeps the number of samples consumed; a stream keeps its place as well.
 6. order.py      A sample -> (source, window), int64: a permutation per epoch, computed from (fingerprint, seed, epoch).
 7. loader.py     Window w is T + 1 tokens of its source, from token w T on. This process, or a worker of workers.py, reads L
                  -> rows [L, T + 1] int64, and for each row the positions at which documents begin, int64.
 8. batch.make_batch  -> input_ids [L, T] int64, labels [L, T] int64 (the next tokens; -100 where a document ends and after
                  a row's end), cu_seqlens [N + 1] int32 (where documents begin in the flattened rows; None if their
                  boundaries are ignored). Under context parallelism each rank keeps its T / parts columns.
 9. train/        A loader hands out the micro-batches of one step at a time. `batch.to_device` takes each to the GPU:
                  model(input_ids, labels, cu_seqlens) -> the sum of the losses.

Validation takes the windows of the held-out shards in order (loader.ValidationLoader) and then steps 8 and 9. stream.py
(`data.source = "hf"`) does 1, 2, 7 and 8 while training. synthetic/ computes rows on the device, for studies of state
tracking. shard_check.py compares shards with their hashes while training goes on. inspect/ shows what is in shards.
"""
