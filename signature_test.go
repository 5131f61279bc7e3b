package plugin_test

import (
	"io"
	"testing"
)

// Types with parts that gob would leave out.
type (
	Hooks   struct{ Before, After func() error }
	Options struct {
		Name  string
		Hooks *Hooks
	}
	Logging struct {
		Level int
		Out   io.Writer
	}
	Logs    struct{ All map[string][]Logging }
	Signals struct{ Done [2]<-chan bool }
	Linked  struct {
		Next *Linked
		Call func(int)
	}
)

// These have such parts as well, but gob never sees them.
type (
	Sealed  struct{ Out io.Writer } // encodes itself
	Binary  struct{ Call func() }   // encodes itself
	Private struct {
		_ chan bool // unexported
		N int
	}
	Mixed struct {
		Sealed  Sealed
		Binary  *Binary
		Private Private
		Any     any
	}
)

func (Sealed) GobEncode() ([]byte, error)      { return nil, nil }
func (*Sealed) GobDecode([]byte) error         { return nil }
func (*Binary) MarshalBinary() ([]byte, error) { return nil, nil }
func (*Binary) UnmarshalBinary([]byte) error   { return nil }

// For refuses what would be lost in silence, and says where it is.
func TestLostParts(t *testing.T) {
	forPanics[Takes[Options]](t, "method M", "Options.Hooks.Before", "func() error")
	forPanics[Gives[*Options]](t, "Options.Hooks.Before")
	forPanics[Second[Logs]](t, "Logs.All[key][i].Out", "io.Writer")
	forPanics[Takes[Signals]](t, "Signals.Done[i]", "chan bool")
	forPanics[Takes[*Linked]](t, "Linked.Call", "func(int)")
	forPanics[Takes[[]func()]](t, "[i]", "func()")
	forPanics[Takes[map[string]chan int]](t, "[key]", "chan int")
	forPanics[Takes[map[<-chan int]string]](t, "a key of", "chan int")
	forPanics[Takes[func(Options) error]](t, "Options.Hooks.Before")
	forPanics[Takes[Mixed]](t)
}

// The error about the form of a method says what is wrong with it.
func TestForms(t *testing.T) {
	forPanics[interface{ M(...int) error }](t, "method M: func(...int) error is variadic")
	forPanics[interface{ M() }](t, "method M: the last result of func() is not an error")
	forPanics[interface{ M() (error, int) }](t, "last result of func() (error, int) is not an error")
	forPanics[interface{ M() (int, int, error) }](t, "(int, int, error) returns more than one result")
	forPanics[Takes[func()]](t, "method M: the last result of func() is not an error")
}
