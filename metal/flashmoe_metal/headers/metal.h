// What Metal lacks of the words that the bodies use: nothing so far.
