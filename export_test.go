package plugin

// OpenStreams returns how many streams are open on the connection of a broker.
func OpenStreams(b *MuxBroker) int { return b.session.mux.NumStreams() }
