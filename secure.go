package plugin

import (
	"bytes"
	"hash"
	"io"
	"os"
	"sync"
)

// SecureConfig has the checksum of a plugin's binary. On Linux with /proc, the file
// that was checked is the file that runs, even if its path gets another file. (A script
// sees another path in $0.) On other systems, the other file runs. A file that is
// changed in place after the check runs on every system. Kill waits for the check.
//
// Several clients may use one SecureConfig.
type SecureConfig struct {
	// Checksum is the expected checksum.
	Checksum []byte
	// Hash computes the checksum, such as sha256.New().
	Hash hash.Hash
}

var hashMu sync.Mutex // guards every Hash

// Check reports whether a file has the expected checksum. It returns
// [ErrSecureConfigNoChecksum], [ErrSecureConfigNoHash], or an error of reading the file.
// Another checksum is not an error.
func (s *SecureConfig) Check(filePath string) (bool, error) {
	f, err := s.open(filePath)
	if err == ErrChecksumsDoNotMatch {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	_ = f.Close() // it was only read
	return true, nil
}

// open opens a file if it has the expected checksum.
func (s *SecureConfig) open(path string) (*os.File, error) {
	switch {
	case len(s.Checksum) == 0:
		return nil, ErrSecureConfigNoChecksum
	case s.Hash == nil:
		return nil, ErrSecureConfigNoHash
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	sum, err := s.sum(f)
	if err == nil && !bytes.Equal(sum, s.Checksum) {
		err = ErrChecksumsDoNotMatch
	}
	if err != nil {
		_ = f.Close() // it was only read
		return nil, err
	}
	return f, nil
}

// sum returns the checksum of a file.
func (s *SecureConfig) sum(f io.Reader) ([]byte, error) {
	hashMu.Lock()
	defer hashMu.Unlock()
	s.Hash.Reset()
	_, err := io.Copy(s.Hash, f)
	if err != nil {
		return nil, err
	}
	return s.Hash.Sum(nil), nil
}
