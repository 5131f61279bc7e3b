package plugin

import (
	"bytes"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
)

// This file is about what a method of an interface may look like, and as what its
// parameters and its result are sent.

var (
	typeOfNumber      = reflect.TypeFor[uint32]()
	typeOfReader      = reflect.TypeFor[io.Reader]()
	typeOfWriter      = reflect.TypeFor[io.Writer]()
	typeOfReadCloser  = reflect.TypeFor[io.ReadCloser]()
	typeOfWriteCloser = reflect.TypeFor[io.WriteCloser]()
)

// signature is the form of a method, or of a function that is a parameter.
type signature struct {
	takesContext bool         // as the first parameter
	params       []slot       // after the context; the last is a writer if the result is a sequence
	result       slot         // a struct{} for none
	returns      int          // how many results there are, with the error
	sentType     reflect.Type // what is sent for params
	connects     bool         // a parameter or the result has a stream of its own
}

// slot is what a signature has for a parameter or a result.
type slot struct {
	reflect.Type // a slot is printed as its type
	kind         slotKind
	sentType     reflect.Type // its type if it is plain; typeOfNothing for a sequence as result
	function     *signature   // if it is a function
}

// slotKind says how a value is sent.
type slotKind int

const (
	plainSlot    slotKind = iota // as gob encodes it
	readerSlot                   // as the number of a reader
	writerSlot                   // as the number of a writer
	functionSlot                 // as the number of a service with the method Call
	sequenceSlot                 // as the number of a reader; as a result, see newSignature
)

// newSignature returns the signature of a function, or an error that says why it cannot
// be called. The types outer are those of the functions around it: the function is a parameter
// of the last one, the last one is a parameter of the one before, and so on.
func newSignature(t reflect.Type, outer ...reflect.Type) (*signature, error) {
	if slices.Contains(outer, t) {
		return nil, fmt.Errorf("the function type %v contains itself", t)
	}
	if err := checkForm(t); err != nil {
		return nil, err
	}
	functions := append(outer, t)
	s := &signature{returns: t.NumOut(), result: slot{Type: typeOfNothing, sentType: typeOfNothing}}
	if t.NumOut() == 2 || isIterator(t.Out(0)) {
		result, err := newSlot(t.Out(0), typeOfReadCloser, typeOfWriteCloser, functions)
		if err != nil {
			return nil, err
		}
		s.result = result
	}
	for i := range t.NumIn() {
		if i == 0 && t.In(0) == typeOfContext {
			s.takesContext = true
			continue
		}
		param, err := newSlot(t.In(i), typeOfReader, typeOfWriter, functions)
		if err != nil {
			return nil, err
		}
		s.params = append(s.params, param)
	}
	if s.result.kind == sequenceSlot {
		s.result.sentType = typeOfNothing // the values go to one more parameter
		s.params = append(s.params, slot{Type: typeOfWriter, kind: writerSlot, sentType: typeOfNumber})
	}
	s.connects = s.result.isNotPlain() || slices.ContainsFunc(s.params, slot.isNotPlain)
	s.sentType = argumentType(s.params)
	return s, nil
}

// checkForm returns an error if a function cannot be called, whatever its parameters.
func checkForm(t reflect.Type) error {
	n := t.NumOut()
	switch {
	case t.IsVariadic():
		return fmt.Errorf("%v is variadic", t)
	case n == 1 && isIterator(t.Out(0)):
		return nil
	case n == 0 || t.Out(n-1) != typeOfError:
		return fmt.Errorf("the last result of %v is not an error", t)
	case n > 2:
		return fmt.Errorf("%v returns more than one result and an error", t)
	case n == 2 && isIterator(t.Out(0)):
		return fmt.Errorf("%v must be the only result: it ends with its own error", t.Out(0))
	case n == 2 && t.Out(0).Kind() == reflect.Func:
		return fmt.Errorf("%v cannot be a result: it is a function", t.Out(0))
	}
	return nil
}

// newSlot describes a parameter or the result, of type t, of the last of the functions. The
// others are around it, as in newSignature. The types of a stream there are reader and writer:
// io.Reader and io.Writer for a parameter, io.ReadCloser and io.WriteCloser for the result.
func newSlot(t, reader, writer reflect.Type, functions []reflect.Type) (slot, error) {
	v := slot{Type: t, sentType: typeOfNumber}
	switch {
	case t == reader:
		v.kind = readerSlot
	case t == writer:
		v.kind = writerSlot
	case t == typeOfContext || t == typeOfError:
		return v, errors.New("a context must be the first parameter, and an error the last result")
	case isOfPackageIO(t):
		return v, fmt.Errorf("%v cannot be sent, but %v and %v can", t, reader, writer)
	case isIterator(t):
		v.kind = sequenceSlot
		return v, checkSequence(t, len(functions) > 1)
	case t.Kind() == reflect.Func:
		v.kind = functionSlot
		function, err := newSignature(t, functions...)
		v.function = function
		return v, err
	default:
		v.sentType = t
		return v, checkPlain(t)
	}
	return v, nil
}

// isIterator reports whether a type is an iter.Seq or iter.Seq2.
func isIterator(t reflect.Type) bool {
	return t.Kind() == reflect.Func && (t.CanSeq() || t.CanSeq2())
}

// checkSequence returns an error if a sequence cannot be sent, as those of a callback.
func checkSequence(t reflect.Type, ofCallback bool) error {
	yield := t.In(0)
	if yield.NumIn() != 2 || yield.In(1) != typeOfError {
		return fmt.Errorf("%v cannot be sent: use an iter.Seq2[T, error], which can say why it ends", t)
	}
	if ofCallback {
		return fmt.Errorf("%v cannot be sent: a callback takes and returns no sequences", t)
	}
	return checkPlain(yield.In(0))
}

func isOfPackageIO(t reflect.Type) bool {
	return t.Kind() == reflect.Interface && t.PkgPath() == "io"
}

// checkPlain returns an error if values of a type cannot be sent, or would arrive without
// some of their parts.
func checkPlain(t reflect.Type) error {
	if err := checkParts(t, t.String(), make(map[reflect.Type]bool)); err != nil {
		return err
	}
	return checkGob(t)
}

// checkParts returns an error if a part of a type cannot be sent. Gob leaves some of them
// out, but the user expects what was set. path leads to t, and checked are the types that
// need not be looked at again.
func checkParts(t reflect.Type, path string, checked map[reflect.Type]bool) error {
	if checked[t] || encodesItself(t) {
		return nil
	}
	checked[t] = true
	if t.Kind() == reflect.Func || t.Kind() == reflect.Chan || isOfPackageIO(t) {
		return fmt.Errorf("%s cannot be sent: a %v cannot be a part of what gob encodes", path, t)
	}
	switch t.Kind() {
	case reflect.Pointer:
		return checkParts(t.Elem(), path, checked)
	case reflect.Slice, reflect.Array:
		return checkParts(t.Elem(), path+"[i]", checked)
	case reflect.Map:
		if err := checkParts(t.Key(), "a key of "+path, checked); err != nil {
			return err
		}
		return checkParts(t.Elem(), path+"[key]", checked)
	case reflect.Struct:
		return checkFields(t, path, checked)
	}
	return nil
}

// checkFields is checkParts for the exported fields of a struct.
func checkFields(t reflect.Type, path string, checked map[reflect.Type]bool) error {
	for i := range t.NumField() {
		field := t.Field(i)
		if !field.IsExported() {
			continue
		}
		if err := checkParts(field.Type, path+"."+field.Name, checked); err != nil {
			return err
		}
	}
	return nil
}

// argumentCount returns how many arguments a caller passes after the context.
func (s *signature) argumentCount() int {
	if s.result.kind == sequenceSlot {
		return len(s.params) - 1
	}
	return len(s.params)
}

// argumentType returns the type that is sent for params: a single one as it is, or a
// struct.
func argumentType(params []slot) reflect.Type {
	if len(params) == 1 {
		return params[0].sentType
	}
	var fields []reflect.StructField
	for i, p := range params {
		fields = append(fields, reflect.StructField{Name: fmt.Sprintf("A%d", i), Type: p.sentType})
	}
	return reflect.StructOf(fields)
}

// param returns parameter i in what is sent.
func (s *signature) param(sent reflect.Value, i int) reflect.Value {
	if len(s.params) == 1 {
		return sent
	}
	return sent.Field(i)
}

// element returns what a sequence yields.
func (v slot) element() reflect.Type { return v.In(0).In(0) }

func (v slot) isNotPlain() bool { return v.kind != plainSlot }

// isNillable reports whether an untyped nil is one of the values.
func (v slot) isNillable() bool {
	switch v.Type.Kind() {
	case reflect.Pointer, reflect.Interface, reflect.Slice, reflect.Map, reflect.Func:
		return true
	}
	return false
}

// checkGob returns an error if gob cannot send values of a type. An empty slice makes
// gob look at the type, without a value that its GobEncode might refuse.
func checkGob(t reflect.Type) (err error) {
	defer recoverTo(&err)
	var buf bytes.Buffer
	list := reflect.New(reflect.SliceOf(t))
	if err := gob.NewEncoder(&buf).EncodeValue(list.Elem()); err != nil {
		return err
	}
	return gob.NewDecoder(&buf).DecodeValue(list)
}

// checkNil returns an error for a nil pointer. gob would only panic.
func checkNil(v reflect.Value) error {
	for t := v.Type(); v.Kind() == reflect.Pointer; v = v.Elem() {
		if v.IsNil() {
			return fmt.Errorf("plugin: a nil %v cannot be sent as the only parameter or as the result", t)
		}
	}
	return nil
}
