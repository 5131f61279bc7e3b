package plugin

// Helpers that all tests share.
var (
	Check      = check
	ErrorSays  = errorSays
	RecordText = recordText
)

// OpenStreams returns how many streams are open on the connection of a broker.
func OpenStreams(b *MuxBroker) int { return b.session.mux.NumStreams() }
