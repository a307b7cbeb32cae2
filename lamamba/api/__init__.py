"""One function for each verb: options in, a result out, progress by one protocol; nothing is printed."""
