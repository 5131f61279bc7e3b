package plugin_test

import (
	"encoding/gob"
	"reflect"
	"runtime"
	"strings"
	"testing"

	"github.com/muxplug/plugin"
)

// Types whose values can hold themselves.
type (
	Twin    struct{ Next, Prev *Twin }
	Pointer *Pointer
	Lists   []Lists
	Maps    map[string]Maps
	Link    struct {
		V    any
		Next *Link
	}
	Chain struct{ Next *Chain }
)

// twins are two that hold each other.
func twins() *Twin {
	t := &Twin{Next: &Twin{}}
	t.Next.Prev = t
	return t
}

// chain returns a chain with so many pointers.
func chain(length int) *Chain {
	var c *Chain
	for range length {
		c = &Chain{Next: c}
	}
	return c
}

func (*testServer) Twin(_ *Twin, reply *Twin) error   { *reply = *twins(); return nil }
func (*testServer) Lists(_ Lists, reply *Lists) error { return nil }
func (*testServer) Maps(_ Maps, reply *Maps) error    { return nil }
func (*testServer) Link(in *Link, reply *Link) error  { return mirrored(*in, reply) }
func (*testServer) Chain(in *Chain, length *int) error {
	for ; in != nil; in = in.Next {
		*length++
	}
	return nil
}

// NewChain replies with a chain.
func (*testServer) NewChain(length int, reply *Chain) error { return mirrored(*chain(length), reply) }

func init() {
	gob.Register(Lists{})
	gob.Register(Twin{})
}

// A value that holds itself, or is nested too deeply, is an error of its call, which the
// host and the plugin survive.
func TestEndlessValues(t *testing.T) {
	t.Parallel()
	_, p := startPlugin(t, testConfig("plugin"))
	client := dispense(t, p)
	lists := make(Lists, 1)
	lists[0] = lists
	maps := Maps{}
	maps["self"] = maps
	inMap := map[string]any{}
	inMap["self"] = inMap
	tree, list := &Tree{}, []any{nil}
	tree.Leaf, list[0] = tree, list
	var pointer Pointer
	pointer = &pointer
	for _, test := range []struct {
		name, method string
		arg, reply   any
		says         string
	}{
		{"pointers", "Twin", twins(), new(Twin), "itself"},
		{"reply", "Twin", &Twin{}, new(Twin), "itself"},
		{"slices", "Lists", lists, new(Lists), "itself"},
		{"maps", "Maps", maps, new(Maps), "itself"},
		{"in an interface", "Box", Box{twins()}, new(Box), "itself"},
		{"map in an interface", "Box", Box{inMap}, new(Box), "itself"},
		{"interface in a struct", "Box", tree, new(Box), "itself"},
		{"interface in a slice", "Box", Box{list}, new(Box), "itself"},
		{"slices in an interface", "Box", Box{lists}, new(Box), "itself"},
		{"pointer to itself", "Box", Box{pointer}, new(Box), "itself"},
		{"pointer to its own type", "Box", Box{new(Pointer)}, new(Box), "Pointer"},
		{"too deep", "Chain", chain(100_001), new(int), "100000 levels"},
		{"reply too deep", "NewChain", 100_001, new(Chain), "100000 levels"},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := plugin.Call(boundedContext(t), client.Client, "Plugin."+test.method, test.arg, test.reply)
			errorSays(t, err, "Plugin."+test.method, test.says)
			mustCall[Box](t, client.Client, "Box", Box{"still there"})
		})
	}
}

// A value that is deep, but does not hold itself, arrives.
func TestDeepValues(t *testing.T) {
	t.Parallel()
	_, p := startPlugin(t, testConfig("plugin"))
	client := dispense(t, p)
	checkEqual(t, "the length", mustCall[int](t, client.Client, "Chain", chain(99_999)), 99_999)
	var first *Link
	for n := range 20_000 {
		first = &Link{V: n, Next: first}
	}
	got := mustCall[Link](t, client.Client, "Link", first)
	for link, want := &got, first; ; link, want = link.Next, want.Next {
		if link == nil || want == nil {
			checkEqual(t, "the end", link, want)
			break
		}
		if link.V != want.V {
			t.Fatalf("a link has %v and not %v", link.V, want.V)
		}
	}
	// The same pointer twice is not a value that holds itself.
	twin := &Twin{Next: &Twin{}}
	shared := mustCall[Box](t, client.Client, "Box", Box{[]any{twin, twin, []any{twin}}})
	if want := (Box{[]any{*twin, *twin, []any{*twin}}}); !reflect.DeepEqual(shared, want) {
		t.Errorf("%v and not %v", shared, want)
	}
}

// A value above the limit of gob fails before it has been encoded.
func TestTooLargeValue(t *testing.T) {
	client := connectOurs(t, newTestServer())
	pieces := make([]any, 600) // which have 9.4 GiB together
	piece := strings.Repeat("x", 16<<20)
	for i := range pieces {
		pieces[i] = piece
	}
	texts := make([]string, len(pieces))
	for i := range texts {
		texts[i] = piece
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for _, arg := range []any{Box{pieces}, texts, map[int][]string{1: texts}} {
		err := plugin.Call(boundedContext(t), client, "Plugin.Box", arg, new(Box))
		errorSays(t, err, "GiB", "reader or writer")
	}
	runtime.ReadMemStats(&after)
	if used := after.TotalAlloc - before.TotalAlloc; used > 64<<20 {
		t.Errorf("%d bytes were allocated", used)
	}
}
