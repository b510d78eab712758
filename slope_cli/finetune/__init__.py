"""`slope finetune`: BERT on GLUE and SQuAD v1.1."""
