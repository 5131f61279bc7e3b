module github.com/muxplug/plugin/interop

go 1.25.0

require (
	github.com/hashicorp/go-hclog v1.6.3
	github.com/hashicorp/go-plugin v1.8.0
	github.com/muxplug/plugin v0.1.0
)

require (
	github.com/fatih/color v1.13.0 // indirect
	github.com/hashicorp/yamux v0.1.2 // indirect
	github.com/mattn/go-colorable v0.1.12 // indirect
	github.com/mattn/go-isatty v0.0.14 // indirect
	golang.org/x/sys v0.0.0-20220503163025-988cb79eb6c6 // indirect
)

replace (
	github.com/hashicorp/go-plugin => ../compat
	github.com/muxplug/plugin => ..
)
