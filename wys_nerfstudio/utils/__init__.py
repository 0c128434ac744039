"""Files, images, logging and other helpers that know nothing of scenes or editors."""
