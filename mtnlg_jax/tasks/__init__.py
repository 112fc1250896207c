"""Text tasks (continue, summarise, translate, sentiment, answer) with answers and scores."""
