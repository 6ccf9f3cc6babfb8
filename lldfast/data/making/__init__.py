"""From texts with a domain label to token shards and an evaluation corpus."""
