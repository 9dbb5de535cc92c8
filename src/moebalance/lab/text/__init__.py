"""Text for runs. In reading order:

python_text           the text that every Python ships, in four domains
sources               Python, a file, a folder or a data set → documents one by one
corpus                kept, sorted and hashed documents
tokens                text → ids: bytes, or byte pairs learnt from the text
checkpoint_tokenizer  text → ids: the tokeniser in the folder of a model
data                  split, tokenised and packed sequences, and one hash of them
batches               which sequence is read when
"""
