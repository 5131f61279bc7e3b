package plugin

import (
	"encoding"
	"encoding/gob"
	"errors"
	"fmt"
	"reflect"
	"sync"
)

// This file looks at a value before gob encodes it. gob follows pointers without a limit:
// in a value that holds itself it never ends, and one that is too deep overflows the stack,
// which ends the process. A value that is too large fails only when all of it has been
// encoded. So these are found out before.

const (
	// maxDepth is how many pointers, slices, maps and interfaces may lie in each other.
	// A value that holds itself has more.
	maxDepth = 100_000
	// maxValues is how many values a message may have. One that has more has the same
	// pointers in it again and again, and gob encodes what they point to each time.
	maxValues = 1 << 26
	// maxMessage is gob's limit for the size of a message: 8 GiB, or 1 GiB on 32 bits.
	maxMessage = 1 << 30 << (^uint(0) >> 62)
	// maxPlainValues is how many values are looked at for their size alone.
	maxPlainValues = 1000
	// maxPointers is more than the pointers that any useful type begins with.
	maxPointers = 100
)

var (
	errTooDeep  = fmt.Errorf("it holds itself, or is nested more than %d levels deep", maxDepth)
	errTooLarge = fmt.Errorf("it is larger than %d GiB, the limit of gob: "+
		"send it through a reader or writer", maxMessage>>30)
	errTooMany = errors.New("it has too many values, or the same ones too often")
)

// inspect returns an error if gob must not encode v. If define is not nil, it is called
// with the types of the values in interfaces.
func inspect(v reflect.Value, define func(reflect.Type)) error {
	if !v.IsValid() {
		return nil
	}
	i := &inspection{define: define}
	return i.visit(v, contentOf(v.Type()))
}

// inspection is one walk through a value.
type inspection struct {
	define      func(reflect.Type)
	depth       int
	size        uint64 // the message is at least so large
	values      int
	plainValues int
}

// visit looks at a value whose type has that content.
func (i *inspection) visit(v reflect.Value, c *content) error {
	switch c.kind {
	case fixedContent:
		return nil
	case plainContent:
		// It cannot hold itself, so only its size matters. Most values that are too large
		// show it within these. gob refuses the others, but when it has encoded them.
		i.plainValues++
		if i.plainValues > maxPlainValues {
			return nil
		}
	}
	i.values++
	if i.values > maxValues {
		return errTooMany
	}
	switch v.Kind() {
	case reflect.String:
		return i.grow(v.Len())
	case reflect.Array:
		return i.visitElements(v, c.parts[0])
	case reflect.Struct:
		return i.visitFields(v, c.parts)
	}
	if v.IsNil() {
		return nil
	}
	i.depth++
	if i.depth > maxDepth {
		return errTooDeep
	}
	err := i.visitInside(v, c.parts)
	i.depth--
	return err
}

// visitInside visits what a pointer, slice, map or interface holds.
func (i *inspection) visitInside(v reflect.Value, parts []*content) error {
	switch v.Kind() {
	case reflect.Pointer:
		return i.visit(v.Elem(), parts[0])
	case reflect.Interface:
		i.defineBase(v.Elem().Type())
		return i.visit(v.Elem(), contentOf(v.Elem().Type()))
	case reflect.Slice:
		if err := i.grow(v.Len()); err != nil { // each has a byte at least
			return err
		}
		return i.visitElements(v, parts[0])
	default:
		return i.visitEntries(v, parts[0], parts[1])
	}
}

func (i *inspection) visitElements(v reflect.Value, element *content) error {
	if element.kind == fixedContent {
		return nil
	}
	for n := range v.Len() {
		if err := i.visit(v.Index(n), element); err != nil {
			return err
		}
	}
	return nil
}

func (i *inspection) visitEntries(v reflect.Value, key, element *content) error {
	for entries := v.MapRange(); entries.Next(); {
		if err := i.visit(entries.Key(), key); err != nil {
			return err
		}
		if err := i.visit(entries.Value(), element); err != nil {
			return err
		}
	}
	return nil
}

func (i *inspection) visitFields(v reflect.Value, fields []*content) error {
	for n, field := range fields {
		if err := i.visit(v.Field(n), field); err != nil {
			return err
		}
	}
	return nil
}

// grow adds to the size of the message.
func (i *inspection) grow(n int) error {
	i.size += uint64(n)
	if i.size > maxMessage {
		return errTooLarge
	}
	return nil
}

// defineBase calls define with the type that gob sends for t.
func (i *inspection) defineBase(t reflect.Type) {
	if i.define == nil {
		return
	}
	for n := 0; n < maxPointers && t.Kind() == reflect.Pointer; n++ { // type P *P has no end
		t = t.Elem()
	}
	i.define(t)
}

// content is what gob may find in the values of a type.
type content struct {
	kind contentKind
	// parts are the contents of the element of a pointer, array or slice, of the key and
	// the element of a map, or of the fields of a struct.
	parts []*content
}

// contentKind is the kind of a type's content, which is the highest of its parts'.
type contentKind int

const (
	fixedContent contentKind = iota // nothing to look at; the size of a map is left to gob
	plainContent                    // strings and slices
	deepContent                     // interfaces, and types that contain themselves
)

var contents sync.Map // reflect.Type to *content

func contentOf(t reflect.Type) *content {
	if known, ok := contents.Load(t); ok {
		return known.(*content)
	}
	c := findContent(t, make(map[reflect.Type]*content))
	contents.Store(t, c)
	return c
}

// findContent finds the content of a type. found has every type met so far. One that is still
// being looked into counts as deepContent, because what holds it is recursive.
func findContent(t reflect.Type, found map[reflect.Type]*content) *content {
	if c := found[t]; c != nil {
		return c
	}
	c := &content{kind: deepContent}
	found[t] = c
	if encodesItself(t) {
		c.kind = fixedContent
		return c
	}
	kind := fixedContent
	switch t.Kind() {
	case reflect.Interface:
		kind = deepContent
	case reflect.String:
		kind = plainContent
	case reflect.Pointer, reflect.Array:
		c.parts = []*content{findContent(t.Elem(), found)}
	case reflect.Slice:
		kind = plainContent
		c.parts = []*content{findContent(t.Elem(), found)}
	case reflect.Map:
		c.parts = []*content{findContent(t.Key(), found), findContent(t.Elem(), found)}
	case reflect.Struct:
		c.parts = findFields(t, found)
	}
	for _, part := range c.parts {
		kind = max(kind, part.kind)
	}
	c.kind = kind
	return c
}

func findFields(t reflect.Type, found map[reflect.Type]*content) []*content {
	fields := make([]*content, t.NumField())
	for n := range fields {
		if field := t.Field(n); field.IsExported() {
			fields[n] = findContent(field.Type, found)
		} else {
			fields[n] = &content{kind: fixedContent} // gob does not look inside
		}
	}
	return fields
}

// encodesItself reports whether a type has a GobEncode or MarshalBinary, which gob calls
// instead of looking inside.
func encodesItself(t reflect.Type) bool {
	for _, t := range []reflect.Type{t, reflect.PointerTo(t)} {
		if t.Implements(reflect.TypeFor[gob.GobEncoder]()) ||
			t.Implements(reflect.TypeFor[encoding.BinaryMarshaler]()) {
			return true
		}
	}
	return false
}
